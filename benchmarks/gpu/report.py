def write(out):
    p = out / "report.md"
    p.write_text("x")
    return p
