"""The configuration of a small workload in ``job.py``, whose model has 14 parameters."""

CONFIG = """
[run]
path = "{path}"
[workload]
task = "job.py:task"
train = "job.py:train"
queries = {{ test = "job.py:test" }}
[projection]
kind = "identity"
dim = 14
[index]
dtype = "float32"
chunk_rows = 10
"""
