"""The verbs: each reads top to bottom like the README says it."""
