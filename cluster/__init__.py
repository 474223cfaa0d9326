"""Where work runs and bytes live: Ray session, artifact store."""
