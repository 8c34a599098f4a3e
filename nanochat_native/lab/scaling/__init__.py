"""Scaling experiments: the models of one recipe at several depths, and models of several depths at equal FLOPs.

`plan` has the flags and lists the runs, `study` makes them, `analysis` fits their losses by `fits`, and `report` shows
the result.
"""
