"""Decoded tokens a second by weights of 4, 8 and 16 bits, from bench/results: mega200M and a Llama in llama.cpp."""

from style import BLUE, ORANGE, legend_below, panels

from bench.summary import LLAMA_CPP, newest_page_with

WEIGHTS = {
    "4 bits": ("int4", "llama.cpp Q4_0"),
    "8 bits": ("int8", "llama.cpp Q8_0"),
    "16 bits": ("bfloat16", "llama.cpp BF16"),
}
PAGE = newest_page_with(LLAMA_CPP)

rates = PAGE.decoding()
contexts = [label for label in rates[LLAMA_CPP] if label.startswith("after")]  # "after 1,000 tokens"
highest = max(rates[path][context] for paths in WEIGHTS.values() for path in paths for context in contexts)
figure, three = panels(7.2, 3.6, columns=3)
for axes, (bits, paths) in zip(three, WEIGHTS.items()):
    for path, colour, offset in zip(paths, (BLUE, ORANGE), (-0.21, 0.21)):
        for i, context in enumerate(contexts):
            rate = rates[path][context]
            axes.bar(i + offset, rate, width=0.4, color=colour)
            axes.text(i + offset, rate, f"{rate:,.0f}", ha="center", va="bottom", fontsize=8.5)
    axes.set_xticks(range(len(contexts)), [context.split()[1] for context in contexts])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.08 * highest)
    axes.set(title=f"weights of {bits}", xlabel="tokens before", ylabel="tokens a second")
    axes.title.set(fontsize=11)
names = {"mega200M, this package": BLUE, "Llama, llama.cpp": ORANGE}
cores = {"2": "two"}.get(PAGE.cores, PAGE.cores)
legend_below(figure, names, f"187M weights read for each token, {cores} cores of an {PAGE.processor}")
