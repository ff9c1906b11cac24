"""Arithmetic on documents: the scaling rules, and what turns a spec into a plan. Imports no torch and no numpy."""
