# What a newcomer types; see README.md.

.PHONY: deps

# Installs what is missing on Debian 12, and says so.
deps:
	@tests/deps.sh
