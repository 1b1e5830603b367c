"""Whether the answers of a run are any good: what users measure before they train on them.

``vlmbatch quality OUTPUT`` is ``measure`` (measuring.py): one pass over the results. Each measure
is a module of ``measures/`` behind one protocol (base.py). ``gates`` turn figures into exit codes;
``filters`` apply the same detectors to one row at a time, for exports.
"""
