"""Other projects' checkpoint layouts as maps over the parameter table: where every element of a tensor comes from."""
