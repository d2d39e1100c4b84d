"""What any program needs: files, locks, interrupts, progress bars, the Hugging Face hub."""
