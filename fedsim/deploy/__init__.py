"""Real devices: keys, a door for the fleet, and programs that keep the others running."""
