"""Where documents begin and end in a batch, for the tests of attention inside documents."""

# Borders in 2 rows of 150 tokens: documents of 1 token, of equal and of different lengths, a row of one document.
BORDERS = {
    "mixed": [0, 1, 2, 9, 70, 139, 150, 215, 280, 300],
    "whole rows": [0, 150, 300],
    "one row whole": [0, 150, 151, 300],
    "short": [*range(0, 150, 13), *range(150, 301, 15)],
}
