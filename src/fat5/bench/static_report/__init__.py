"""What the compiler made of every shipped kernel configuration, on a machine without a GPU.

problems.py lists problems and records the launches they need, compile.py compiles a recorded launch for any
architecture and reads its resources, report.py holds them against the architecture's limits.
"""
