"""The benchmark of pglimits: every figure beside its floor or its peer, measured in the same run on the same server.

``pglimits bench`` runs it. Installed, this package is called ``pglimits_bench``.

A row is a function with ``@row(name, what)`` (``_rows.py``) in one of the modules that ``_run.py`` lists. It gets a
place to measure in (``bench.site()``), lets ours and the floor take turns (``_measure.alternate``) and yields lines
and curves (``_results.py``). What pgbench runs is in ``_scripts.py``, how much is measured in ``_scale.py``, and what
makes calls in processes of its own in ``_worker.py``. A peer is a module in ``peers`` with a ``PEER`` and a function
``subject``.
"""
