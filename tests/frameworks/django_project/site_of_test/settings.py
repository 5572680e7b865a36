"""The settings of the project. Where its database is says libpq's own environment."""

import os

SECRET_KEY = "of a test"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "site_of_test.urls"
INSTALLED_APPS = ["pglimits.django"]
MIDDLEWARE = ["site_of_test.urls.whole_site"]
USE_TZ = True
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
    "limits": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ["PGHOST"],
        "PORT": os.environ["PGPORT"],
        "USER": os.environ["PGUSER"],
        "NAME": os.environ["PGDATABASE"],
        "ATOMIC_REQUESTS": True,
        "OPTIONS": {"application_name": "site_of_test", "isolation_level": 3, "server_side_binding": True},
        "TEST": {"DEPENDENCIES": []},
    },
}
PGLIMITS_DATABASE = "limits"
