"""Execution of plans with torch. Knows no scaling rule: a number it lacks is a field the plan lacks."""
