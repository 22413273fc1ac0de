"""Ray: workers, sweeps, sampling. The only importer of ray."""
