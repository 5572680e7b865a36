"""The benchmark of pglimits: every figure beside its floor or its peer, measured in the same run on the same server.

``pglimits bench`` runs it. Installed, this package is called ``pglimits_bench``.
"""
