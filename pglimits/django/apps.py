"""The app: what ``migrate`` does, and what a test run needs."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.db import connections, transaction
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder
from django.db.models.signals import post_migrate

from .. import __version__, _install
from .._database import numbers
from ._limiter import close, database

_MIGRATION = "pglimits", "0001_install"


class PglimitsConfig(AppConfig):  # type: ignore[misc]
    name = "pglimits.django"
    label = "pglimits"
    verbose_name = "pglimits"

    def ready(self) -> None:
        post_migrate.connect(_upgrade, sender=self)
        # The database of a test cannot be dropped while a limiter is connected.
        creation = connections[database()].creation
        destroy = creation.destroy_test_db

        def destroy_test_db(*args: Any, **kwargs: Any) -> None:
            close(database())
            destroy(*args, **kwargs)

        creation.destroy_test_db = destroy_test_db


def install(connection: Any) -> None:
    """Install the SQL in the transaction that is open."""
    with connection.cursor() as cursor:
        cursor.execute(_install.plain(without_roles=getattr(settings, "PGLIMITS_WITHOUT_ROLES", False)))


def uninstall(connection: Any) -> None:
    """Remove it, with every limit and lease, in the transaction that is open."""
    with connection.cursor() as cursor:
        cursor.execute(_install.plain_uninstall())


def _upgrade(using: str, **_: Any) -> None:
    """After each ``migrate``: bring what is there up to this version.

    Install it where that was not done: tests do without migrations, another alias of the same database has recorded
    it, a router has kept it away.
    """
    if using != database() or connections[using].vendor != "postgresql":
        return
    with connections[using].cursor() as cursor:
        cursor.execute("select to_regprocedure('pglimits.version()') is not null")
        if cursor.fetchone()[0]:
            cursor.execute("select pglimits.version()")
            is_wanted = numbers(cursor.fetchone()[0]) < numbers(__version__)
        else:
            without_migrations = MigrationLoader.migrations_module("pglimits")[0] is None
            is_wanted = without_migrations or _MIGRATION in MigrationRecorder(connections[using]).applied_migrations()
    if is_wanted:
        with transaction.atomic(using=using):
            install(connections[using])
