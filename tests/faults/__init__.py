"""Faults on purpose: random settings, broken data, kills, full disks, races, tampered files.

An outcome is right if it is the correct result, or one sentence that names the key or file that is
wrong, and nothing else. ``python -m tests.faults --help`` tells how to begin; a kind of fault is a
module here, and ``kinds`` tells what it must have.
"""
