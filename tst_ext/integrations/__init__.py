"""TST in loops that exist already. Each module imports one library, which is an extra of the package or stands alone."""
