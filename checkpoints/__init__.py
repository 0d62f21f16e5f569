"""Files of trained models: our own (`ours`) and the authors' released ones (`released`)."""
