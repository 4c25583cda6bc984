"""The chart of the tutorial on forecasts, by the tutorial's own code."""

import re

from style import REPOSITORY, panels

panels(6.4, 3.2)
_PAGE = (REPOSITORY / "docs" / "tutorials" / "forecast.md").read_text()
for _code in re.findall(r"^```python\n(.*?)^```$", _PAGE, re.S | re.M):
    exec(_code.replace('plt.savefig("forecast.png")', ""))
    if "plt.savefig" in _code:
        break
