"use strict";
// Asked by the pages beside it, in a frame: which cards have all of these words, one of these statuses, this mark?
const MOST = 200;
const cards = JSON.parse(document.getElementById("data").textContent);
const texts = cards.map((card) => card.slice(3, 8).join("\n").toLowerCase());

addEventListener("message", ({ data, source }) => {
  if (source !== parent || !Array.isArray(data?.words)) return;
  let count = 0;
  const found = [];
  cards.forEach(([page, , status, , , model, , , marks], at) => {
    if (page === data.page || (data.statuses.length && !data.statuses.includes(status))) return;
    if (data.mark && !(data.mark === "none" ? marks?.length === 0 : marks?.includes(data.mark))) return;
    if ((data.model && model !== data.model) || !data.words.every((word) => texts[at].includes(word))) return;
    count += 1;
    if (found.length < MOST) found.push(cards[at]);
  });
  parent.postMessage({ question: data.question, count, found }, "*");
});
parent.postMessage({ models: [...new Set(cards.map((card) => card[5]))].filter(Boolean).sort() }, "*");
