"use strict";
// Asked by the pages beside it, in a frame: which cards have all of these words, and one of these statuses?
const MOST = 200;
const cards = JSON.parse(document.getElementById("data").textContent);
const texts = cards.map(([, , , ...words]) => words.join("\n").toLowerCase());

addEventListener("message", ({ data, source }) => {
  if (source !== parent || !Array.isArray(data?.words)) return;
  let count = 0;
  const found = [];
  cards.forEach(([page, , status, , , model], at) => {
    if (page === data.page || (data.statuses.length && !data.statuses.includes(status))) return;
    if ((data.model && model !== data.model) || !data.words.every((word) => texts[at].includes(word))) return;
    count += 1;
    if (found.length < MOST) found.push(cards[at]);
  });
  parent.postMessage({ question: data.question, count, found }, "*");
});
parent.postMessage({ models: [...new Set(cards.map((card) => card[5]))].filter(Boolean).sort() }, "*");
