"""Questions on documents: blocks, the two engines that write questions, and what is checked about a row."""
