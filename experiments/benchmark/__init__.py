"""Speed and memory of models and layers, measured interleaved in one process.

`timing` measures, `contestants` builds what is measured, `suite` says which settings belong together, `report` writes
the files.
"""
