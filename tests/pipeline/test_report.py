from prefixquant.pipeline.report import render_report


def test_a_rendered_report_has_prefix_perplexities_and_block_errors():
    record = {
        "name": "small",
        "prefix": {"token_ids": [7, 1], "tokens": ["\n", "<s>"]},
        "perplexity": [{"model": "quantized", "text": "c4", "ppl": 12.344, "tokens": 99}],
        "blocks": [{"error": 0.25, "error_before_search": 0.5}],
    }
    text = render_report(record)
    assert text.startswith("# small\n")
    assert r"Prefix: '\n' (7), '<s>' (1)" in text
    assert "| quantized | c4 | 12.34 | 99 |" in text
    assert "| 0 | 0.50000 | 0.25000 |" in text
    empty = render_report(record | {"prefix": {"token_ids": [], "tokens": []}, "perplexity": []})
    assert "Prefix: none" in empty
    assert "perplexity" not in empty
