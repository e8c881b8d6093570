"""The node agent: puts plans into the kernel of one machine and reads them back."""
