"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const WARM = [[255, 243, 196], [254, 196, 79], [236, 112, 20], [140, 45, 4]];
  const COOL = [[241, 238, 246], [189, 201, 225], [116, 169, 207], [43, 140, 190], [3, 78, 123]];
  let group = 0;
  let chosen = data.first;

  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const percent = (x, digits = 0) => (100 * x).toFixed(digits) + " %";

  function colour(ramp, x) {
    const at = Math.min(Math.max(x, 0), 1) * (ramp.length - 1);
    const low = Math.min(Math.floor(at), ramp.length - 2);
    return "rgb(" + ramp[low].map((c, i) => Math.round(c + (at - low) * (ramp[low + 1][i] - c))).join(",") + ")";
  }

  function paint(rects, values, top, unit) {
    rects.forEach((rect, index) => {
      const share = values ? values[index] / 255 : 0;
      rect.setAttribute("fill", colour(WARM, share));
      rect.setAttribute("fill-opacity", values ? (0.06 + 0.74 * share).toFixed(3) : 0);
      rect.firstChild.textContent = values ? `${rect.dataset.at}: ${percent(share * top, 2)} ${unit}` : rect.dataset.at;
    });
  }

  // The same word in the other answer: same spelling, same occurrence.
  function counterpart(version, word) {
    const spelling = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
    const words = data.versions[chosen.version].words;
    const wanted = spelling(words[word].text);
    const nth = words.slice(0, word).filter((each) => spelling(each.text) === wanted).length;
    const same = data.versions[version].words.map((each, i) => [each, i]).filter(([each]) => spelling(each.text) === wanted);
    return nth < same.length ? same[nth][1] : null;
  }

  function bar(label, value, title, kind = "", mark = null) {
    const width = value === null ? 0 : Math.min(100 * value, 100);
    const tick = mark === null ? "" : `<i style="left:${100 * mark}%" title="flagged from ${mark} on"></i>`;
    const number = value === null ? "–" : kind === "doubt" ? value.toFixed(2) : percent(value);
    return `<span title="${title}">${label}</span><span class="track ${kind}"><b style="width:${width}%"></b>${tick}</span>` +
      `<span class="number">${number}</span>`;
  }

  function describe(panel, word) {
    panel.innerHTML = "";
    const head = document.createElement("h3");
    const say = document.createElement("p");
    say.className = "soft";
    panel.append(head, say);
    if (!word) {
      head.textContent = "not said";
      say.textContent = "This answer does not have the word.";
      return;
    }
    head.textContent = "“" + word.text + "”";
    say.textContent = word.say;
    const bars = document.createElement("div");
    bars.className = "bars";
    bars.innerHTML = bar("as said", word.p, "probability of the word where it was said") +
      bar("without the image", word.p0, "the same prompt and words, the image's tokens left out") +
      bar("image hidden", word.hidden, "attention edges from the image to everything behind it cut") +
      bar("context hidden", word.context, "attention edges from the objects and the place named before cut") +
      bar("looks at the image", word.mass, "attention on the image in the row that predicts the word, mean over layers and heads") +
      (word.name ? bar("says yes if asked", word.asked, "asked whether there is a " + word.name) +
        bar("doubt", word.doubt, "see below", "doubt", data.threshold) : "");
    panel.append(bars);
  }

  function heads(version, word) {
    const root = document.querySelector(`.heads[data-version="${version}"]`);
    if (!root) return;
    const values = bytes(word === null ? data.versions[version].heads : data.versions[version].words[word].heads);
    all("rect", root).forEach((rect, index) => {
      const share = values[index] / 255;
      rect.setAttribute("fill", colour(COOL, share));
      rect.firstChild.textContent = `${rect.dataset.at}: ${(share * data.topHeads).toFixed(2)}`;
    });
    root.querySelector("p").textContent = word === null ? "mean over all words" :
      "at “" + data.versions[version].words[word].text + "”";
  }

  function show() {
    data.versions.forEach((version, number) => {
      const at = number === chosen.version ? chosen.word : counterpart(number, chosen.word);
      const word = at === null ? null : version.words[at];
      const root = document.querySelector(`.version[data-version="${number}"]`);
      paint(all(".map rect", root), word && bytes(word.maps[group]), data.tops[group], "of the attention");
      root.querySelector(".looks").textContent = word ?
        `“${word.text}” looks at the image with ${percent(word.mass)} of its attention` : "not said here";
      all(".word", root).forEach((button, i) => button.setAttribute("aria-pressed", String(i === at)));
      describe(document.querySelector(`.panel[data-version="${number}"]`), word);
      heads(number, at);
    });
    document.getElementById("top").textContent = percent(data.tops[group], 1);
    all("#groups button").forEach((button, i) => button.setAttribute("aria-pressed", String(i === group)));
  }

  all(".version .word").forEach((button) => {
    const place = { version: Number(button.dataset.version), word: Number(button.dataset.word) };
    button.addEventListener("click", () => { chosen = place; show(); });
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = step && document.querySelector(
        `.word[data-version="${place.version}"][data-word="${place.word + step}"]`);
      if (next) { next.focus(); next.click(); event.preventDefault(); }
    });
  });
  all("#groups button").forEach((button, i) => button.addEventListener("click", () => { group = i; show(); }));
  document.getElementById("colour").addEventListener("change", (event) =>
    document.body.classList.toggle("in-colour", event.target.checked));
  all(".sinks").forEach((root) => paint(all("rect", root), bytes(data.versions[root.dataset.version].sinks),
    data.topSinks, "of the attention of a row"));
  if (chosen) show();
})();
