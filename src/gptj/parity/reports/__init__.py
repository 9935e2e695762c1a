"""Reports of findings: the same document for programs, for a CI system, for a job's summary, and as a page.

    json_report    gptj.parity.findings.Findings.to_json
    junit.py       JUnit XML, which CI systems show as tests           render_junit
    markdown.py    Markdown for a job's summary, cut to GitHub's size  render_markdown
    text.py        text for a terminal                                 render_text
    page.py        one HTML file, without scripts or a network         render_page
    output.py      which report a file's name asks for, written        write_report

    spelling.py    numbers and shares in words; texts that nothing can hide in
    markup.py      elements, whose texts are escaped
    heat_map.py    layer by operation, as SVG
    line_chart.py  sizes along depth or along a text, as SVG

All are made from the findings alone, by the standard library.
"""
