"""What `doctor` looks at, a file for each: a function `check` takes a `Setting` and gives findings.

A check never ends the run: what it raises is a finding too (`doctor.examine`).
"""
