// The SDK for Java, version 1.

import com.amazonaws.auth.DefaultAWSCredentialsProviderChain;
import com.amazonaws.client.builder.AwsClientBuilder.EndpointConfiguration;
import com.amazonaws.services.securitytoken.AWSSecurityTokenService;
import com.amazonaws.services.securitytoken.AWSSecurityTokenServiceClientBuilder;
import com.amazonaws.services.securitytoken.model.GetCallerIdentityRequest;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.Locale;

public class Client {
  public static void main(String[] arguments) throws Exception {
    DefaultAWSCredentialsProviderChain chain = new DefaultAWSCredentialsProviderChain();
    AWSSecurityTokenService sts =
        AWSSecurityTokenServiceClientBuilder.standard()
            .withCredentials(chain)
            .withEndpointConfiguration(
                new EndpointConfiguration(System.getenv("STS_URL"), System.getenv("AWS_REGION")))
            .build();
    tell(sts, null);
    BufferedReader lines = new BufferedReader(new InputStreamReader(System.in));
    for (String line = lines.readLine(); line != null; line = lines.readLine()) {
      tell(sts, line.equals("go on") ? null : chain);
    }
  }

  static void tell(AWSSecurityTokenService sts, DefaultAWSCredentialsProviderChain stale) {
    long start = System.nanoTime();
    String error = "null";
    try {
      if (stale != null) {
        stale.refresh();
      }
      sts.getCallerIdentity(new GetCallerIdentityRequest());
    } catch (RuntimeException thrown) {
      error = '"' + thrown.toString().replaceAll("[\\\\\"\\p{Cntrl}]", " ") + '"';
    }
    double seconds = (System.nanoTime() - start) / 1e9;
    System.out.println(String.format(Locale.ROOT, "{\"seconds\": %f, \"error\": %s}", seconds, error));
  }
}
