"""Reading LongBlocks, as published or as built here, into training rows; splitting them; mixing short rows in."""
