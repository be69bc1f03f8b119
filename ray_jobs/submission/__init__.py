"""Jobs at a cluster: what is sent, how its server is spoken to, how a job is followed."""
