"""Load and measurements: commands that print tables, and the clients that they and the tests share."""
