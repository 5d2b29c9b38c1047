"""What training needs beside a network: batches, loading, optimisation, checkpoints."""
