"""Installs the SQL."""
