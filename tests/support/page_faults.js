// Returns what a reader of the page would stumble over, as a list of sentences.
async (width, scheme) => {
  const faults = [];
  const isPhone = width < 600;
  if (!document.getElementById("still")) {
    const style = document.createElement("style");
    style.id = "still";
    style.textContent = "*, *::before, *::after { transition: none !important; }";
    document.head.append(style); // Colours would otherwise be read while they change.
  }
  document.body.setAttribute("data-md-color-scheme", scheme);
  const soon = () => new Promise((resolve) => setTimeout(resolve, 10));
  while (innerWidth !== width) await soon();
  await document.fonts.ready;

  // Names an element by its text.
  const named = (element) => {
    const text = (element.textContent || "").trim().replace(/\s+/g, " ").slice(0, 60);
    return `<${element.tagName.toLowerCase()}> "${text}"`;
  };
  const isShown = (element) => element.getClientRects().length > 0;
  const isTooWide = (element) => element.scrollWidth > element.clientWidth + 1;
  const content = document.querySelector(".md-content") || document.body;
  const all = (selector) => [...content.querySelectorAll(selector)].filter(isShown);
  for (const folded of content.querySelectorAll("details")) folded.open = true;

  const looksAtShapes = scheme === "default"; // Colours change no shapes.
  const root = document.documentElement;
  if (looksAtShapes && root.scrollWidth > width) {
    faults.push(`the page is ${root.scrollWidth} pixels wide`);
    for (const element of all("*")) {
      if (element.getBoundingClientRect().right > width + 1) {
        faults.push(`beyond the right edge: ${named(element)}`);
        break;
      }
    }
  }

  if (looksAtShapes) {
    // Equations: nothing of them is cut, and nothing is printed over them.
    for (const equation of all(".katex-display")) {
      const style = getComputedStyle(equation);
      if (equation.scrollHeight > equation.clientHeight + 1) {
        faults.push(`cut above or below: ${named(equation)}`);
      }
      const scrolls = ["auto", "scroll"].includes(style.overflowX);
      if (isTooWide(equation) && !(isPhone && scrolls)) faults.push(`cut: ${named(equation)}`);
      const box = equation.getBoundingClientRect();
      const block = equation.closest(".arithmatex, p") || equation;
      for (const neighbour of [block.previousElementSibling, block.nextElementSibling]) {
        if (!neighbour || !isShown(neighbour)) continue;
        const other = neighbour.getBoundingClientRect();
        const overlap = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (overlap > 1) faults.push(`${named(neighbour)} is printed over ${named(equation)}`);
      }
    }
    for (const formula of all("p .katex, li .katex, td .katex")) {
      if (formula.closest(".katex-display")) continue;
      const block = formula.closest("td, li, p").getBoundingClientRect();
      if (formula.getBoundingClientRect().right > block.right + 1) {
        faults.push(`sticks out: ${named(formula)}`);
      }
    }
    for (const error of all(".katex-error, .arithmatex")) faults.push(`not set: ${named(error)}`);

    // Laptops show every table and every line of code; phones may scroll those.
    if (!isPhone) {
      for (const table of all(".md-typeset__scrollwrap")) {
        if (isTooWide(table)) faults.push(`too wide: the table ${named(table)}`);
      }
      for (const code of all("pre > code")) {
        if (isTooWide(code)) {
          const lines = code.textContent.split("\n");
          const longest = lines.reduce((a, b) => (b.length > a.length ? b : a));
          faults.push(`too wide: the code "${longest}"`);
        }
      }
    }
    for (const image of all("img")) {
      if (!image.complete || !image.naturalWidth) faults.push(`not loaded: ${image.src}`);
    }
  }

  // Contrast: WCAG's ratio of text to its background.
  const channels = (color) => {
    const numbers = (color.match(/[\d.]+/g) || []).map(Number);
    return numbers.length < 4 ? [...numbers, 1] : numbers;
  };
  const luminance = ([r, g, b]) => {
    const linear = [r, g, b].map((c) =>
      c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const over = (top, below) =>
    [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]);
  const backgrounds = new Map();
  const background = (element) => {
    if (!element) return [255, 255, 255];
    if (!backgrounds.has(element)) {
      const own = channels(getComputedStyle(element).backgroundColor);
      backgrounds.set(element, own[3] === 1 ? own : over(own, background(element.parentElement)));
    }
    return backgrounds.get(element);
  };
  const seen = new Set(); // Of elements of one kind, the first is looked at.
  if (isPhone) return faults; // The colours are those of the laptop.
  for (const element of all("p, li, td, th, code, code span, h1, h2, h3, h4, a, summary")) {
    const hasText = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!hasText || element.closest(".headerlink, .katex")) continue;
    const { parentElement: parent } = element;
    const kind = [element.tagName, element.className, parent.tagName, parent.className].join();
    if (seen.has(kind)) continue;
    seen.add(kind);
    const behind = background(element);
    const ink = over(channels(getComputedStyle(element).color), behind);
    const [low, high] = [luminance(ink), luminance(behind)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 3) faults.push(`contrast of ${ratio.toFixed(1)}: ${named(element)}`);
  }
  return faults;
}
