"""The commands of the shell, one module for each group; `jaxllm.cli` puts them together."""
