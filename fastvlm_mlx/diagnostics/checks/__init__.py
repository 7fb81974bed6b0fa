"""The checks of `doctor`, one file each: a function `check` takes a `Setting` and yields findings.

A check never ends the run: an exception becomes a finding too (`doctor.examine`).
"""
