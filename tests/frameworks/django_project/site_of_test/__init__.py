"""A project of Django, as small as can be."""
