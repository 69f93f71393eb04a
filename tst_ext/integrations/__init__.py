"""TST in loops that exist already. Each module needs one library at most, an extra of this package."""
