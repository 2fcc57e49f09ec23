"""The kernel research harness: gates, timing against measured ceilings, tuning, comparison.

``python -m pallas_kernels.lab --help`` is its face. An op takes part when its folder has a
``cases.py`` with what ``ops.Op`` describes; a kernel of your own takes part as "module:function".
"""
