"""Results of appendix A, the original guide corrected."""

from chapters import demonstration, reference

RESULTS = {
    "original_code": demonstration("original-code"),
    "original_statements": demonstration("original-statements"),
}
REFERENCES = {
    "2309.17453": reference("Xiao et al.", "Efficient Streaming Language Models with Attention Sinks", 2023),
    "2310.17813": reference("Yang, Simon and Bernstein", "A Spectral Condition for Feature Learning", 2023),
}
