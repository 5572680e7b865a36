"""Installs the SQL. Later versions of it are installed after ``migrate``, as ``apps`` does it."""

from typing import Any

from django.db import migrations

from .._limiter import database
from ..apps import install, uninstall


def _forwards(_: Any, editor: Any) -> None:
    if editor.connection.alias == database():
        install(editor.connection)


def _backwards(_: Any, editor: Any) -> None:
    if editor.connection.alias == database():
        uninstall(editor.connection)


class Migration(migrations.Migration):  # type: ignore[misc]
    initial = True
    operations = [migrations.RunPython(_forwards, _backwards)]  # noqa: RUF012
