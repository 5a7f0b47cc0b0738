"""Faults on purpose: random settings, broken data, kills, full disks, races, tampered files. See ``python -m tests.faults --help``.

An outcome is right if it is the correct result, or one sentence that names the key or file that is wrong, and nothing else.
"""
