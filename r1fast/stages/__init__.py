"""The stages of the R1 recipe, one file per verb."""
