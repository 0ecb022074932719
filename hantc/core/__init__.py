"""Types, configuration, errors, the pass and backend interfaces, the store: knows no torch graph."""
