"""Methods against each other, over seeds: `irdscale compare`."""
