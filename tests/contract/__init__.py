"""What every strategy must satisfy: one row of `rows.ROWS` each, one file for each clause."""
