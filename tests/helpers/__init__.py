"""What several tests use: cases and their oracles, tolerances, processes, small models and runs."""
