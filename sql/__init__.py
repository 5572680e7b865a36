"""The SQL of pglimits, as package data: see install.sql for the order in which it is applied."""
