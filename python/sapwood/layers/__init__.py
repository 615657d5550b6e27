"""Builders of nodes: attention, linear, norm, rotary, embedding. Used by models/ while it records; nothing here runs
in a step.
"""
