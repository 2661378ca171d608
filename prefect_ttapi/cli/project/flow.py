"""The images of prompts.csv that are not there yet: each of them is paid for once."""

from prefect import flow

from prefect_ttapi import Budget, ImageStore, TTAPICredentials, generate_batch, read_prompts


@flow(persist_result=False)
def nightly(prompts: str, store: str, deliver: str, key: str = "{name}.{ext}", max_images: int = 100) -> str:
    """Generate and deliver what is missing.

    Args:
        prompts: The file of prompts. Columns that are no field of a request can be used in the key.
        store: Where images and the ledger are kept: a folder or s3://bucket/prefix.
        deliver: Where copies go: a folder or s3://bucket/prefix.
        key: The template of their names.
        max_images: How many images a run pays for at most. The next run goes on from there.
    """
    given = read_prompts(prompts, key=key)
    report = generate_batch(
        given.requests,
        TTAPICredentials.from_env(),  # TTAPI_API_KEY
        ImageStore(url=store),
        deliver_to=ImageStore(url=deliver),
        key=key,
        values=given.values,
        budget=Budget(images=max_images),
        name="nightly",
    )
    return report.summary


if __name__ == "__main__":
    print(nightly("prompts.csv", "./images", "./website"))
